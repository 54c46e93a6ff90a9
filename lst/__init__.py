"""The Latent Speech-Text Transformer: data, model, training, evaluation."""
