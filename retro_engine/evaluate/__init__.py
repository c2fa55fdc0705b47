"""What a model is worth: bits per byte with retrieval on, off and random; facts."""
