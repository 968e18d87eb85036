"""The pre-processed arrays and what training sees of them: two random views of each image."""
