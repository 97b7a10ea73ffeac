"""What only a GPU can show: `make gpu-check` runs it whole, the test suite its CPU parts."""
