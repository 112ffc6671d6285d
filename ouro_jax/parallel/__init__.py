"""Floor 3: devices as a mesh, and what the model's logical axes mean on it."""
