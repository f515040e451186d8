"""Smaller, faster weights: each method transforms them and brings the layer that runs them."""
