"""What an evaluation found, as rows, sentences, plots and one HTML page."""
