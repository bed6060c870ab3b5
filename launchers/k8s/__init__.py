"""executor=k8s: a run as a Job, a PyTorchJob or a RayJob of a Kubernetes cluster."""
