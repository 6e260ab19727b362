"""The child: it owns disk and GPU, and knows no Kafka, no object store and no credential but the model hub's token."""
