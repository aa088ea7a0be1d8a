"""From a model to chosen kernels: capture, describe, estimate, choose, rewrite, report."""
