from mistudio_stack import Stack
from mistudio_train.settings import Settings


def test_settings_point_at_the_stack_and_at_names_of_their_own(stack: Stack, worker_settings: Settings) -> None:
    assert worker_settings.kafka_bootstrap_servers == stack.bootstrap_servers
    assert worker_settings.minio_endpoint == stack.minio_endpoint
    assert worker_settings.minio_access_key.get_secret_value() == stack.access_key
    assert worker_settings.minio_secret_key.get_secret_value() == stack.secret_key
    assert worker_settings.topics.requested == f"{worker_settings.minio_bucket}.train.requested"
