"""What a trained model draws, what its experts learnt, and a report of both."""
