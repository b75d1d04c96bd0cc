from tests.ray.conftest import input_folder, local_ray, spam_folder  # noqa: F401
