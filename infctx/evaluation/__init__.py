"""What a model is worth: loss by position and distance, recall, and other people's tasks."""
