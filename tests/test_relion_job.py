"""`emsplat-relion` under the command lines that RELION's job type External builds, in a project directory."""

import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import mrcfile
import pytest
from gemmi import cif

from emsplat.io.relion.read import read_star
from emsplat.relion_job import main

JOB = "External/job005/"
PARTICLES = "Extract/job002/particles.star"
RELION_FILES = ("run.out", "run.err", "note.txt", "job.star", "job_pipeline.star", "default_pipeline.star")
KINDS = {
    "run_data.star": "ParticleGroupMetadata.star.relion",
    "run_class001.mrc": "DensityMap.mrc",
    "run_half1_class001_unfil.mrc": "DensityMap.mrc.halfmap",
    "run_half2_class001_unfil.mrc": "DensityMap.mrc.halfmap",
    "backprojection_half1.mrc": "DensityMap.mrc.halfmap",
    "backprojection_half2.mrc": "DensityMap.mrc.halfmap",
    "mask.mrc": "Mask3D.mrc",
    "local_resolution.mrc": "Image3D.mrc.localresmap",
}


@pytest.fixture(scope="module")
def particles(simulated):
    return simulated(particles=300, snr=1.0)


@pytest.fixture
def project(particles, tmp_path):
    """A project directory with particles whose images are named from there, and the folder of a new job."""
    (tmp_path / "Extract").mkdir()
    shutil.copytree(particles.parent, tmp_path / "Extract" / "job002")
    star = tmp_path / PARTICLES
    star.write_text(star.read_text().replace("@particles.mrcs", "@Extract/job002/particles.mrcs"))
    (tmp_path / JOB).mkdir(parents=True)
    for name in RELION_FILES:
        (tmp_path / JOB / name).write_text("data_\n")
    return tmp_path


def command(*words):
    return [str(Path(sys.executable).parent / "emsplat-relion"), "--o", JOB, *words]


def run(project, *words, particles=PARTICLES):
    """As RELION runs it: in the project, output appended to run.out and run.err, --j behind the parameters."""
    words = ["--o", JOB, "--in_parts", particles, *words, "--j", "1"]
    with ExitStack() as stack:
        for name, redirect in (("run.out", redirect_stdout), ("run.err", redirect_stderr)):
            stack.enter_context(redirect(stack.enter_context((project / JOB / name).open("a"))))
        stack.enter_context(chdir(project))
        try:
            return main(words)
        except SystemExit as end:  # options that cannot be read
            return end.code


def endings(project):
    return {path.name for path in (project / JOB).glob("RELION_JOB_*")}


def nodes(project):
    block = cif.read(str(project / JOB / "RELION_OUTPUT_NODES.star")).find_block("output_nodes")
    return dict(map(tuple, block.find(["_rlnPipeLineNodeName", "_rlnPipeLineNodeTypeLabel"])))


def relion_files(project):
    return {name: (project / JOB / name).read_text() for name in RELION_FILES[2:]}


def test_success_and_continue(project):
    before = relion_files(project)
    # A switch has no value, and RELION writes underscores or hyphens as the user does.
    words = ("--growth", "0", "--epochs", "2", "--isotropic", "--learning_rate", "0.02")
    assert run(project, *words) == 0
    assert endings(project) == {"RELION_JOB_EXIT_SUCCESS"}
    assert nodes(project) == {JOB + name: kind for name, kind in KINDS.items()}
    for name in nodes(project):
        path = project / name
        assert path.is_file()
        if path.suffix == ".mrc":
            assert mrcfile.validate(path)
        elif path.suffix == ".star":
            assert len(read_star(path, project)) == 300
    assert "isotropic = true" in (project / JOB / "config.toml").read_text()
    assert "half maps" in (project / JOB / "run.out").read_text()
    assert (project / JOB / "run.err").read_text() == "data_\n"
    # Continue: the same command again, then one with another value.
    written = (project / JOB / "run_class001.mrc").stat().st_mtime_ns
    (project / JOB / "RELION_OUTPUT_NODES.star").unlink()
    assert run(project, *words) == 0
    assert len(nodes(project)) == len(KINDS)
    assert run(project, *words, "--seed", "2") == 2
    assert "another seed" in (project / JOB / "run.err").read_text()
    assert endings(project) == {"RELION_JOB_EXIT_FAILURE"}
    assert (project / JOB / "run_class001.mrc").stat().st_mtime_ns == written
    # Anew, with the mask of before.
    shutil.copy(project / JOB / "mask.mrc", project / "mask.mrc")
    words = ("--in_mask", "mask.mrc", "--growth", "0", "--epochs", "1", "--overwrite", "--pipeline_control", JOB)
    (project / JOB / "stale.txt").touch()
    assert run(project, *words) == 0
    assert 'mask = "mask.mrc"' in (project / JOB / "config.toml").read_text()
    assert not (project / JOB / "stale.txt").exists()
    assert endings(project) == {"RELION_JOB_EXIT_SUCCESS"}
    assert relion_files(project) == before


def test_wrong_symmetry_fails_until_it_is_said_to_be_meant(project):
    """The maps are there but no other job takes them; Continue lists them once the parameter force is added."""
    words = ("--growth", "0", "--epochs", "1", "--gaussians", "300", "--symmetry", "D3")
    assert run(project, *words) == 1
    assert endings(project) == {"RELION_JOB_EXIT_FAILURE"}
    assert not (project / JOB / "RELION_OUTPUT_NODES.star").exists()
    assert (project / JOB / "report.html").is_file()
    error = (project / JOB / "run.err").read_text()
    assert "symmetry D3" in error
    assert "parameter force" in error
    assert run(project, *words) == 1
    assert endings(project) == {"RELION_JOB_EXIT_FAILURE"}
    assert run(project, *words, "--force") == 0
    assert endings(project) == {"RELION_JOB_EXIT_SUCCESS"}
    assert len(nodes(project)) == len(KINDS)


@pytest.mark.slow
def test_abort_and_continue(project):
    # More epochs than any machine gets through before it is told to stop.
    words = ("--growth", "0", "--epochs", "1000000", "--gaussians", "3000", "--decay", "1.0")
    with (project / JOB / "run.out").open("a") as out:
        process = subprocess.Popen(command("--in_parts", PARTICLES, *words, "--j", "1"), cwd=project, stdout=out)
        try:
            while "fits of" not in (project / JOB / "run.out").read_text():
                assert process.poll() is None
                time.sleep(0.1)
            (project / JOB / "RELION_JOB_ABORT_NOW").touch()
            assert process.wait() == 143  # as by SIGTERM
        finally:
            process.kill()
    assert endings(project) == {"RELION_JOB_EXIT_ABORTED"}
    assert not (project / JOB / "RELION_OUTPUT_NODES.star").exists()
    assert run(project, *words[:-4], "--gaussians", "2000", "--decay", "1.0") == 2
    assert "another gaussians" in (project / JOB / "run.err").read_text()
    (project / JOB / "config.toml").write_text(
        (project / JOB / "config.toml").read_text().replace("epochs = 1000000", "epochs = 1")
    )
    assert run(project, "--growth", "0", "--epochs", "1", *words[4:]) == 0
    assert endings(project) == {"RELION_JOB_EXIT_SUCCESS"}
    assert len(nodes(project)) == len(KINDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--in_3dref", "ref.mrc"), 'leave the box "Input 3D reference" empty'),
        (("--in_mics", "mics.star"), 'leave the box "Input micrographs" empty'),
        (("--symmetry", "K9"), "not a point group"),
        (("--threads", "3"), "Number of threads"),
        (("--mask", "a.mrc", "--in_mask", "b.mrc"), "leave the other out"),
        (("--pipeline_control", "External/job006/"), "expected the same"),
        (("--symetry", "D2"), "--symetry"),
    ],
)
def test_failures_say_why(project, words, said):
    assert run(project, *words) == 2
    assert endings(project) == {"RELION_JOB_EXIT_FAILURE"}
    assert said in (project / JOB / "run.err").read_text()
    assert not (project / JOB / "RELION_OUTPUT_NODES.star").exists()


def test_no_particles(project):
    assert run(project, particles="Select/job003/particles.star") == 2
    assert endings(project) == {"RELION_JOB_EXIT_FAILURE"}
    assert subprocess.run(command("--j", "1"), cwd=project, capture_output=True, check=False).returncode == 2


def test_label_of_the_particles_is_that_of_this_relion(tmp_path):
    from emsplat.relion_job import write_nodes

    (tmp_path / "run_data.star").touch()
    path = tmp_path / "RELION_OUTPUT_NODES.star"
    for found, expected in (
        ("ParticlesData.star.relion.refine3d", "ParticlesData.star.relion"),
        ("ParticleGroupMetadata.star.relion.helicalsegments", "ParticleGroupMetadata.star.relion"),
    ):
        (tmp_path / "job_pipeline.star").write_text(
            "\n# version 50001\n\ndata_pipeline_general\n\n_rlnPipeLineJobCounter 2\n\ndata_pipeline_nodes\n\nloop_\n"
            "_rlnPipeLineNodeName #1\n_rlnPipeLineNodeTypeLabel #2\n_rlnPipeLineNodeTypeLabelDepth #3\n"
            f"MaskCreate/job003/mask.mrc Mask3D.mrc.relion 1\nRefine3D/job004/run_data.star {found} 1\n"
        )
        write_nodes(tmp_path, Path("Refine3D/job004/run_data.star"))
        assert path.read_text().split()[-1] == expected


@pytest.mark.parametrize(
    "nodes", ["", "data_pipeline_nodes\n\nloop_\n_rlnPipeLineNodeName #1\n_rlnPipeLineNodeType #2\na 3\n"]
)
def test_a_pipeline_without_labels_says_nothing_of_the_particles(tmp_path, nodes):
    """RELION 3.1 had numbers for the kinds of files."""
    from emsplat.relion_job import write_nodes

    folder = tmp_path / "a job"
    folder.mkdir()
    (folder / "run_data.star").touch()
    (folder / "job_pipeline.star").write_text(f"data_pipeline_general\n\n_rlnPipeLineJobCounter 2\n\n{nodes}")
    write_nodes(folder, Path("a"))
    (row,) = (
        cif.read_file(str(folder / "RELION_OUTPUT_NODES.star"))
        .sole_block()
        .find("_rlnPipeLineNode", ["Name", "TypeLabel"])
    )
    assert Path(row.str(0)).resolve() == folder / "run_data.star"
    assert row.str(1) == "ParticleGroupMetadata.star.relion"
