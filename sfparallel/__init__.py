"""sfparallel: parallel Python whose workers are clones of the running virtual machine."""
