"""Where the model's code runs: containers (the only place that imports docker) or processes of this machine.

They run inside the tool server, never in the trainer.
Start with `docker_sandbox.py`.
"""
