"""The HTTP endpoint on Ray Serve, its jobs, and the model deployment that it shares with bulk jobs."""
