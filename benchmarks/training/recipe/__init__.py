"""The race to a loss: raymill's recipe beside the one that most small trainers start from."""
