"""Optional live sinks: the curves of a job's training logs, shown elsewhere while it runs.

Owns what goes to TensorBoard, MLflow and Weights & Biases; nothing here may fail, change or delay a job.
"""
