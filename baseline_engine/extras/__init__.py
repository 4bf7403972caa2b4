"""What stands around the engine and need not be read to understand it: the command line and the asyncio front."""
