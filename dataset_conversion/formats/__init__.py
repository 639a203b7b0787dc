"""One module per source format or public dataset, each with NAME, HELP, add_arguments(parser) and run(args) -> int."""
