"""What is run once a card is at hand: `bash tests/gpu/run.sh`."""
