"""What a command's exit code says, to shells, schedulers and the supervisor of several ranks."""

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_STOPPED, EXIT_MACHINE = 0, 1, 2, 3, 4
# What shells report of a program that an interrupt ended: there was no checkpoint to write, or no time for it.
EXIT_INTERRUPTED = 130
