"""Places where functions run. Each knows the protocol in ``base``, none knows another."""
