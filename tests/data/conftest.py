from hypothesis import settings

settings.register_profile("unhurried", deadline=None)  # the time a busy machine takes is no defect
settings.load_profile("unhurried")
