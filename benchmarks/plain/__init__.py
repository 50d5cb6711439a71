"""Deliberately plain implementations to measure against: one `nn.Sequential` per network, autograd, default Adam, `.item()` metrics."""
