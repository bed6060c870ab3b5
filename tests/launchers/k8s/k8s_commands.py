"""What the tests of Kubernetes give to the command."""

BARE = [
    "recipe=cpt_llama3",
    "gpus=8",
    "model=hf:/data/model",
    "executor=k8s",
    "image=r/i:1",
    "volumes=[c:/data]",
    "out=/data/run",
]  # the volume and the folder last: tests give others
