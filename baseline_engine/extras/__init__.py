"""What stands around the engine and is no part of the evening: the command line and the asyncio front."""
