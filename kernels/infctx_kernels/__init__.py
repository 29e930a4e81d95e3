"""The WKV6 recurrence and its gradients."""
