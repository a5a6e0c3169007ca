"""Self-Steering Optimization in JAX: see README.md; a run is `sso_jax.iteration.run(config)`."""
