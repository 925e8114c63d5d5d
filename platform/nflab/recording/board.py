"""MLflow's runs of one name as a board on which processes claim them (see `storage.ownership`)."""

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from nflab.recording.client import search
from nflab.storage.ownership import Claim, claim_of, text_of

OWNER = "owner."
"""Beginning of the tags that claim a run; the rest is the claim's token."""


class RunBoard:
    """Claims on an experiment's runs of one name: two storages may both have one."""

    def __init__(self, client: MlflowClient, experiment_id: str, name: str, run_id: str) -> None:
        """`run_id`: the run that this process claims."""
        self._client, self._experiment_id = client, experiment_id
        self._name, self._run_id = name, run_id

    def claims(self) -> dict[str, Claim]:
        """All of them, by token."""
        return {token: claim for run in self._runs() for token, claim in claims_on(run).items()}

    def put(self, claim: Claim) -> None:
        """Writes one, or writes it again."""
        self._client.set_tag(self._run_id, OWNER + claim.token, text_of(claim))

    def remove(self, token: str) -> None:
        """Takes one away, if it is there."""
        for run in self._runs():
            if token in claims_on(run):
                try:
                    self._client.delete_tag(run.info.run_id, OWNER + token)
                except MlflowException as error:
                    # The client asks again by itself when an answer is lost.
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise

    def _runs(self) -> list[Run]:
        own = self._client.get_run(self._run_id)  # which may have been renamed
        if "'" in self._name:  # not by nflab
            return [own]
        named = f"attributes.run_name = '{self._name}'"
        found = search(self._client, self._experiment_id, named)
        return [own, *(run for run in found if run.info.run_id != self._run_id)]


def claims_on(run: Run) -> dict[str, Claim]:
    """The claims that a run is tagged with, by token."""
    found = {}
    for key, text in run.data.tags.items():
        claim = claim_of(text) if key.startswith(OWNER) else None
        if claim is not None:
            found[claim.token] = claim
    return found
