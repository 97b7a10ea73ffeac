"""What only a GPU can show: README.md has the commands; the test suite runs their CPU parts."""
