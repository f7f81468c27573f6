"""The mixture-of-experts layer: routers, experts, and dispatch between ranks."""
