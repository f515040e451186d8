"""Training beside the field: speed to a loss, of a step, of feeding and saving, of more workers, and its memory."""
