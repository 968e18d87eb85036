"""Raw downloads -> the .npy files that the data sets are read from; one script a data set."""
