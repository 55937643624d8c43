from hypothesis import settings

# A first call may import Megatron-Core, which takes seconds: time limits belong to whole tests (pytest-timeout).
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
