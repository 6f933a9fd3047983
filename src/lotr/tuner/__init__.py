"""The skin that makes the library a PEFT method. Nothing outside this folder imports peft at its top."""
