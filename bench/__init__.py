"""The figures of this project, each with the command that makes it."""
