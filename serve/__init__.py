"""Ray Serve: the model behind a deployment, shared by HTTP and bulk jobs."""
