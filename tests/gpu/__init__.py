"""What only a GPU can show; run by `make test-gpu`."""
