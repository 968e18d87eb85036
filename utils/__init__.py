"""What all rooms may use: options, files, clustering, retrieval, evaluation, runs."""
