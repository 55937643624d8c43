from hypothesis import settings

# A first call may import Megatron-Core, which takes seconds: pytest-timeout limits complete tests.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
