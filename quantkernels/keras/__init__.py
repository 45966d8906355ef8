"""The quantizers for Keras."""
