"""From one process to many: who takes part, how a model is sharded, how the processes are started and end. torch's own engine beneath."""
