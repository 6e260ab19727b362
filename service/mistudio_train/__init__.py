"""miStudioTrain: an event-driven worker that trains sparse autoencoders on transformer activations."""

__version__ = "0.1.0"
SERVICE = "miStudioTrain"
