"""One training on several devices: processes of one machine or of several, and what they tell each other."""
