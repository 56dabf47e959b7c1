"""Grids as tasks: every cell once and at its place, as a loop over the file gives it; what is wrong is said in one sentence."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnnp.data import grid_dataset, grid_points, read_grid
from bnnp.data.collection import Collection, divide

netCDF4 = pytest.importorskip("netCDF4")
xarray = pytest.importorskip("xarray")

Array = np.ndarray[Any, Any]
ERA5 = next((p / "shared" / "data" / "era5" for p in Path(__file__).resolve().parents if (p / "shared" / "data" / "era5").is_dir()), None)
HOURS, LATITUDE, LONGITUDE = 30, 7, 5


def values(seed: int = 0) -> dict[str, Array]:
    """Return temperature with gaps, rain, and a height of the ground with a gap."""
    rng = np.random.default_rng(seed)
    temperature = rng.normal(280, 5, (HOURS, LATITUDE, LONGITUDE))
    temperature[rng.random(temperature.shape) < 0.1] = np.nan
    height = rng.gamma(2, 100, (LATITUDE, LONGITUDE))
    height[2, 3] = np.nan
    return {"temperature": temperature, "rain": rng.gamma(1, 1, temperature.shape), "height": height}


def write(
    path: Path, variables: tuple[str, ...] = ("temperature",), seed: int = 0, kind: str = "NETCDF4", start: int = 5, **units: str
) -> Path:
    """Write a file with nothing but netCDF4: packed temperature, gaps as a fill value, times as hours since 2019-03-01."""
    with netCDF4.Dataset(path, "w", format=kind) as file:
        for name, n in (("time", HOURS), ("lat", LATITUDE), ("lon", LONGITUDE)):
            file.createDimension(name, n)
        axes = {"time": np.arange(start, start + HOURS), "lat": 50 - np.arange(LATITUDE) / 4, "lon": np.arange(LONGITUDE) - 2.0}
        said = {"time": "hours since 2019-03-01", "lat": "degrees_north", "lon": "degrees_east"}
        for name, axis in axes.items():
            variable = file.createVariable(name, "f8", (name,))
            variable[:], variable.units = axis, said[name]
        for name in variables:
            array = values(seed)[name]
            if name == "temperature":
                variable = file.createVariable(name, "i2", ("time", "lat", "lon"), fill_value=-32768)
                variable.scale_factor, variable.add_offset, variable.units, variable.long_name = 0.01, 280.0, "K", "air temperature"
                variable[:] = np.ma.array(np.nan_to_num(array, nan=280.0), mask=np.isnan(array))
            else:
                variable = file.createVariable(name, "f8", ("time", "lat", "lon")[-array.ndim :])
                variable[:], variable.units = array, "m" if name == "height" else "mm"
            if name in units:
                variable.units = units[name]
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "t.nc")


def cell_by_cell(path: Path, hour: int, name: str = "temperature") -> tuple[Array, Array]:
    """Return the points of one hour in a loop over the cells of the file."""
    points = []
    with netCDF4.Dataset(path) as file:
        for i in range(LATITUDE):
            for j in range(LONGITUDE):
                value = file[name][hour, i, j]
                points.append((float(file["lat"][i]), float(file["lon"][j]), np.nan if np.ma.is_masked(value) else float(value)))
    table = np.array(points)
    return table[:, :2], table[:, 2:]


def same(a: Collection, b: Collection) -> None:
    assert list(a.names) == list(b.names) and list(a.sizes) == list(b.sizes)
    for one, other in zip(a, b, strict=True):
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("kind", ["NETCDF4", "NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "zarr2", "zarr3", "dataset"])
def test_the_points_are_those_of_a_loop_over_the_cells(tmp_path: Path, kind: str, lazy: bool) -> None:
    path = write(tmp_path / "t.nc", kind=kind if kind.startswith("NETCDF") else "NETCDF4")
    source: Any = path
    if kind.startswith("zarr"):
        pytest.importorskip("zarr")
        source = tmp_path / "t.zarr"
        with xarray.open_dataset(path, mask_and_scale=False) as ds:
            ds.to_zarr(source, zarr_format=int(kind[4:]), consolidated=False)
    elif kind == "dataset":
        source = xarray.open_dataset(path)
    tasks = read_grid(source, lazy=lazy)
    assert len(tasks) == HOURS and tasks.lazy is lazy and tasks.ordered and set(tasks.sizes) == {LATITUDE * LONGITUDE}
    assert tasks.names[0] == "2019-03-01T05:00" and [str(c) for c in (*tasks.inputs, *tasks.outputs)] == [
        "lat [degrees_north]",
        "lon [degrees_east]",
        "temperature [K]",
    ]
    for hour in (0, 1, HOURS - 1):
        x, y, mask = tasks[hour]
        xs, ys = cell_by_cell(path, hour)
        np.testing.assert_array_equal(x, xs)
        np.testing.assert_allclose(y, ys, rtol=1e-7)
        np.testing.assert_array_equal(mask, ~np.isnan(ys))
        assert 0 < mask.mean() < 1
    if kind == "dataset":
        source.close()


def test_an_array_is_a_grid_with_one_variable(file: Path) -> None:
    with xarray.open_dataset(file) as ds:
        same(read_grid(ds.temperature), read_grid(file))


def test_a_later_file_is_read_by_the_recipe_written_down(tmp_path: Path, file: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"task": "time:1D"},
        {"task": "time:6h", "every": {"lat": 2}},
        {"patch": {"lat": 3, "lon": 2}, "stride": {"lat": 2}, "relative": True},
        {"task": (), "patch": {"time": 10}},
        {"inputs": ["time", "time.hour", "lat", "lon"]},
    ]
    later = write(tmp_path / "later.nc", seed=1, start=100)
    for given in kinds:
        first = read_grid(file, **given)
        recipe = json.loads(json.dumps(first.recipe))
        same(read_grid(file, recipe=recipe), first)
        second = read_grid(later, recipe=recipe)
        assert second.inputs == first.inputs and second.outputs == first.outputs and second.recipe == recipe
        if given.get("inputs"):
            assert first[0][0][0, 0] == 5 and second[0][0][0, 0] == 100, "times are counted from one day on"
            assert second[0][0][0, 1] == 4


def test_several_files_are_read_one_after_another(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.nc", seed=seed, start=start) for seed, (name, start) in enumerate((("b", 50), ("a", 5)))]
    together = read_grid(tmp_path / "*.nc", inputs=["time", "lat", "lon"])
    a, b = (read_grid(path, inputs=["time", "lat", "lon"]) for path in reversed(files))
    assert len(together) == 2 * HOURS and together.ordered and together.recipe == a.recipe
    for i in (0, HOURS - 1):
        np.testing.assert_array_equal(together[i][1], a[i][1])
        np.testing.assert_array_equal(together[HOURS + i][1], b[i][1])
    assert together[HOURS][0][0, 0] == 50, "the times of all are on one clock"
    assert list(together.names) == [*a.names, *b.names]
    assert read_grid([files[1], files[0]]).fingerprint == together.fingerprint != read_grid(files).fingerprint
    with pytest.raises(FileNotFoundError, match=r"that match .*none"):
        read_grid(tmp_path / "none-*.nc")
    with pytest.raises(ValueError, match="an empty list"):
        read_grid([])


@pytest.mark.parametrize(("span", "hours"), [("1D", 24), ("day", 24), ("6h", 6), ("2 days", 48), ("180min", 3), ("week", 168)])
def test_a_span_takes_all_its_times_into_one_task(file: Path, span: str, hours: int) -> None:
    tasks, single = read_grid(file, task=f"time:{span}"), read_grid(file)
    clock = np.arange(5, 5 + HOURS)  # hours since midnight
    blocks = [np.flatnonzero(clock // hours == b) for b in np.unique(clock // hours)]
    assert list(tasks.sizes) == [len(b) * LATITUDE * LONGITUDE for b in blocks]
    for (x, y, mask), block in zip(tasks, blocks, strict=True):
        np.testing.assert_array_equal(x[:, 0], np.repeat(clock[block] % hours, LATITUDE * LONGITUDE))
        np.testing.assert_array_equal(x[:, 1:], np.concatenate([single[i][0] for i in block]))
        np.testing.assert_array_equal(y, np.concatenate([single[i][1] for i in block]))
        np.testing.assert_array_equal(mask, np.concatenate([single[i][2] for i in block]))
    assert tasks.names[-1].startswith("2019-03-0") and str(tasks.inputs[0]) == "time [h]"
    assert ("T" in tasks.names[0]) == (hours % 24 != 0)
    assert len(set(tasks.sizes)) == 1 or any("fewer than" in note for note in tasks.notes)


def test_steps_need_no_clock() -> None:
    ds = xarray.Dataset({"y": (("step", "site"), np.arange(12.0).reshape(6, 2))})
    tasks = read_grid(ds, task="step:3")
    x, y, _ = tasks[1]
    assert x.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]] and y.ravel().tolist() == list(range(6, 12))
    assert any("step has no coordinate" in note for note in tasks.notes)


@pytest.mark.parametrize("stride", [None, {"lat": 1}, {"lat": 2, "lon": 1}, {"lon": 3}])
@pytest.mark.parametrize("relative", [False, True])
def test_patches_are_blocks_of_a_field(file: Path, stride: dict[str, int] | None, relative: bool) -> None:
    tasks = read_grid(file, patch={"lat": 3, "lon": 2}, stride=stride, relative=relative, every={"time": 10})
    high, wide = (stride or {}).get("lat", 3), (stride or {}).get("lon", 2)
    index = 0
    for hour in range(0, HOURS, 10):
        x, y = cell_by_cell(file, hour)
        x, y = x.reshape(LATITUDE, LONGITUDE, 2), y.reshape(LATITUDE, LONGITUDE, 1)
        for i in range(0, LATITUDE - 2, high):
            for j in range(0, LONGITUDE - 1, wide):
                xs = x[i : i + 3, j : j + 2].reshape(-1, 2)
                middle = np.array([xs[:, d].min() + xs[:, d].max() for d in (0, 1)]) / 2
                np.testing.assert_allclose(tasks[index][0], xs - middle if relative else xs, atol=1e-12)
                np.testing.assert_allclose(tasks[index][1], y[i : i + 3, j : j + 2].reshape(-1, 1))
                index += 1
    assert index == len(tasks) and len(set(tasks.names)) == len(tasks)
    left = [LATITUDE - 3 - (LATITUDE - 3) // high * high, LONGITUDE - 2 - (LONGITUDE - 2) // wide * wide]
    assert sum("are in no patch" in note for note in tasks.notes) == sum(n > 0 for n in left) + (wide > 2)


def test_overlap_says_how_far_tasks_share_points(file: Path) -> None:
    for given in ({"lat": 1, "lon": 1}, {"lat": 2, "lon": 1}, {"lat": 3, "lon": 2}):
        tasks = read_grid(file, patch={"lat": 3, "lon": 2}, stride=given, every={"time": 15})
        cells = [{(name[:16], *map(float, point)) for point in x} for name, (x, _, _) in zip(tasks.names, tasks, strict=True)]
        far = max((j - i for i in range(len(cells)) for j in range(i + 1, len(cells)) if cells[i] & cells[j]), default=0)
        assert far <= tasks.overlap <= far + 1 and (tasks.overlap > 0) == (far > 0)


def test_windows_along_time(file: Path) -> None:
    tasks = read_grid(file, patch={"time": 10}, stride={"time": 5}, relative=True)
    assert len(tasks) == 5 and tasks.overlap == 1 and tasks.ordered
    np.testing.assert_array_equal(np.unique(tasks[0][0][:, 0]), np.arange(10) - 4.5)
    assert tasks.names[1] == "time 2019-03-01T10:00 to 2019-03-01T19:00"


def test_other_variables_are_inputs_and_their_gaps_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "t.nc", ("temperature", "rain", "height"))
    tasks = read_grid(path, inputs=["height", "temperature", "lat"], outputs=["rain"])
    raw = values()
    with xarray.open_dataset(path) as ds:
        temperature = ds.temperature.values
    for hour in (0, 17):
        whole = ~np.isnan(raw["height"]) & ~np.isnan(temperature[hour])
        x, y, _ = tasks[hour]
        np.testing.assert_array_equal(x[:, 0], raw["height"][whole])
        np.testing.assert_array_equal(x[:, 1], temperature[hour][whole])
        np.testing.assert_array_equal(y[:, 0], raw["rain"][hour][whole])
        assert tasks.sizes[hour] == len(x)
    lost = HOURS * LATITUDE * LONGITUDE - sum(tasks.sizes)
    assert any(note.startswith(f"{lost} of {HOURS * LATITUDE * LONGITUDE} cells lack an input") for note in tasks.notes)
    same(read_grid(path, inputs=["height", "temperature", "lat"], outputs=["rain"], lazy=True), tasks)
    # Where nothing is said, the output is the one that changes with time and is no input.
    assert [c.name for c in read_grid(path, inputs=["lat", "lon", "height", "rain"]).outputs] == ["temperature"]
    both = read_grid(path, outputs=["temperature", "rain"])
    assert both[3][2].any(0).tolist() == [True, True] and not both[3][2].all(0)[0] and both[3][2].all(0)[1]


def test_coordinates_on_two_dimensions_are_inputs() -> None:
    rng = np.random.default_rng(0)
    lat, lon = rng.normal(size=(2, 3, 4))
    lat[1, 1] = np.nan  # a cell outside the projection
    y = rng.normal(size=(5, 3, 4))
    ds = xarray.Dataset({"y": (("time", "j", "i"), y)}, {"lat": (("j", "i"), lat), "lon": (("j", "i"), lon)})
    assert any("lat, lon are on these dimensions" in note for note in read_grid(ds).notes)
    tasks = read_grid(ds, inputs=["lat", "lon"])
    inside = ~np.isnan(lat)
    np.testing.assert_array_equal(tasks[2][0], np.stack([lat[inside], lon[inside]], 1))
    np.testing.assert_array_equal(tasks[2][1][:, 0], y[2][inside])
    x, _, _, grid = grid_points(ds.isel(time=0), tasks.recipe)
    np.testing.assert_array_equal(grid_dataset(grid, {"z": x[:, 0]}).z.values, lat)


def test_series_at_stations_are_tasks_over_time() -> None:
    times = np.datetime64("2020-03-01T06:00", "ns") + np.array([0, 1, 5, 30]) * np.timedelta64(1, "h")
    y = np.arange(8.0).reshape(4, 2)
    ds = xarray.Dataset({"y": (("time", "station"), y)}, {"time": times, "station": ["north", "south"]})
    tasks = read_grid(ds, task="station")
    assert list(tasks.names) == ["north", "south"] and not tasks.ordered and str(tasks.inputs[0]) == "time [h]"
    assert tasks[1][0].ravel().tolist() == [6, 7, 11, 36] and tasks[1][1].ravel().tolist() == [1, 3, 5, 7]
    assert any("time is in hours since 2020-03-01 00:00" in note for note in tasks.notes)


def test_bounds_of_cells_are_no_outputs(tmp_path: Path) -> None:
    ds = SERIES.copy(deep=True).assign(x_bnds=(("x", "two"), np.zeros((3, 2))), time_bnds=(("time", "two"), np.zeros((4, 2))))
    ds.x.attrs["bounds"] = "x_bnds"
    ds.time.attrs.update(bounds="time_bnds", units="days since 2000-01-01")
    ds.to_netcdf(tmp_path / "b.nc")
    tasks = read_grid(tmp_path / "b.nc")
    assert [c.name for c in tasks.outputs] == ["y"] and tasks.names[1] == "2000-01-02T00:00"


def test_fields_without_any_output_are_left_out_and_counted() -> None:
    y = np.ones((4, 3))
    y[1] = np.nan
    tasks = read_grid(xarray.Dataset({"y": (("time", "x"), y)}))
    assert list(tasks.names) == ["time 0", "time 2", "time 3"] and any("1 of 4 tasks" in note for note in tasks.notes)
    assert len(read_grid(xarray.Dataset({"y": (("time", "x"), y)}), lazy=True)) == 4


def test_members_of_an_ensemble_are_groups() -> None:
    ds = xarray.Dataset({"y": (("time", "member", "x"), np.zeros((20, 3, 4)))}, {"time": np.arange(20), "member": list("abc")})
    tasks = read_grid(ds, task=("time", "member"))
    assert tasks.groups is not None and list(tasks.groups[:4]) == ["a", "b", "c", "a"] and tasks.names[1] == "time 0 b"
    parts = divide(tasks, 0.2, 0.2)
    assert min(parts.test) > max(parts.train) and len(parts.test) == 12


def test_dimensions_of_one_index_are_left_out() -> None:
    ds = xarray.Dataset({"y": (("time", "height", "x"), np.zeros((3, 1, 4)))}, {"height": [2.0]})
    tasks = read_grid(ds)
    assert [c.name for c in tasks.inputs] == ["x"] and any("height" in note for note in tasks.notes)
    assert read_grid(ds.squeeze("height"), recipe=tasks.recipe)[0][0].shape == (4, 1)


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
def test_calendars_of_models_are_read(calendar: str) -> None:
    times = xarray.date_range("2000-02-27", periods=60, freq="12h", calendar=calendar, use_cftime=True)
    ds = xarray.Dataset({"y": (("time", "x"), np.zeros((60, 2)))}, {"time": times})
    days = read_grid(ds, task="time:day")
    assert set(days.sizes) == {4} and len(days) == 30 and np.unique(days[29][0][:, 0]).tolist() == [0.0, 12.0]
    fields = read_grid(ds, inputs=["time", "x"])
    assert fields[59][0][0, 0] == 59 * 12 and fields.names[1] == "2000-02-27T12:00:00"
    assert read_grid(ds, recipe=json.loads(json.dumps(days.recipe))).names == days.names


def test_a_field_goes_to_points_and_back(tmp_path: Path) -> None:
    path = write(tmp_path / "t.nc", ("temperature", "height"))
    for given in (
        {"inputs": ["lat", "lon", "height"], "outputs": "temperature"},
        {"outputs": "temperature", "patch": {"lat": 3}, "relative": True, "every": {"lon": 2}},
        {"task": "time:1h", "outputs": "temperature"},
    ):
        recipe = json.loads(json.dumps(read_grid(path, **given).recipe))
        with xarray.open_dataset(path) as ds:
            one = ds.isel(time=[4]) if "1h" in str(given.get("task")) else ds.isel(time=4)
            x, y, mask, field = grid_points(one, recipe)
            assert x.shape == (len(y), len(recipe["inputs"])) and mask.shape == y.shape
            made = grid_dataset(field, {"temperature": y[:, 0], "temperature_sample": np.stack([y[:, 0], x[:, 0]])})
            expected = one.temperature.values.copy()
            if "height" in given["inputs"] if "inputs" in given else False:
                expected[np.isnan(ds.height.values)] = np.nan
            np.testing.assert_array_equal(made.temperature.values, expected)
            np.testing.assert_array_equal(made.temperature_sample.values[0], expected)
            assert made.temperature_sample.dims == ("sample", *one.temperature.dims)
            assert made.temperature.attrs["units"] == made.temperature_sample.attrs["units"] == "K"
            np.testing.assert_array_equal(made.lat.values, ds.lat.values)
            with pytest.raises(ValueError, match=r"Expected temperature with shape \(n,\)"):
                grid_dataset(field, {"temperature": y[:-1, 0]})


def test_targets_need_no_outputs_and_one_field_is_one_field(file: Path) -> None:
    recipe = read_grid(file).recipe
    with xarray.open_dataset(file) as ds:
        finer = xarray.Dataset(coords={"lat": np.linspace(48, 50, 9), "lon": np.linspace(-2, 2, 11)})
        x, y, mask, field = grid_points(finer, recipe)
        assert x.shape == (99, 2) and not mask.any() and np.isnan(y).all()
        assert grid_dataset(field, {"temperature_mean": x[:, 0]}).temperature_mean.attrs["units"] == "K"
        with pytest.raises(TypeError, match="Expected an xarray Dataset or DataArray"):
            grid_points(3, recipe)
        with pytest.raises(ValueError, match=r"Expected one field\. Got 30 along time"):
            grid_points(ds, recipe)
        assert len(read_grid(ds.drop_vars("temperature"), recipe=recipe, outputs_needed=False)) == HOURS
        alone = read_grid(ds.isel(time=3, drop=True), recipe=recipe)
        assert len(alone) == 1 and any("one task" in note for note in alone.notes)


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path, file: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(file, tmp_path / "elsewhere" / "other-name.nc")
    changed = write(tmp_path / "changed.nc", seed=1)
    assert read_grid(copy).fingerprint == read_grid(file).fingerprint != read_grid(changed).fingerprint
    with xarray.open_dataset(file) as ds:
        assert read_grid(ds).fingerprint == read_grid(ds.copy(deep=True)).fingerprint != read_grid(ds + 1e-3).fingerprint


def test_only_the_field_that_is_asked_for_is_read(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    ds = xarray.Dataset({"y": (("time", "x"), np.random.default_rng(0).normal(size=(4, 50)))}, {"x": np.arange(50.0)})
    ds.to_zarr(tmp_path / "z", zarr_format=2, consolidated=False, encoding={"y": {"chunks": (1, 50)}})
    (tmp_path / "z" / "y" / "2.0").write_bytes(b"spoilt")
    tasks = read_grid(tmp_path / "z", lazy=True)
    np.testing.assert_array_equal(tasks[3][1][:, 0], ds.y.values[3])
    with pytest.raises(ValueError, match=r"Expected to read y\. Got"):
        tasks[2]
    with pytest.raises(ValueError, match=r"Expected to read y\. Got"):
        read_grid(tmp_path / "z", lazy=False)


def test_chunks_that_make_reading_slow_are_said(tmp_path: Path) -> None:
    xarray.Dataset({"y": (("time", "x"), np.zeros((40, 50)))}).to_netcdf(tmp_path / "c.nc", encoding={"y": {"chunksizes": (40, 50)}})
    assert any("chunks of 40 x 50" in note for note in read_grid(tmp_path / "c.nc", lazy=True).notes)


def test_longitudes_that_wrap_are_said() -> None:
    def notes(longitude: Any) -> str:
        ds = xarray.Dataset({"y": (("time", "lon"), np.zeros((2, len(longitude))))}, {"lon": longitude})
        return " ".join(read_grid(ds).notes)

    assert "round the globe" in notes(np.arange(0, 360, 10.0))
    wrapped = np.array([0.0, 5.0, 350.0, 355.0])
    assert "jumps by" in notes(wrapped) and "lon=(ds['lon'] + 180) % 360 - 180).sortby('lon')" in notes(wrapped)
    assert "lon" not in notes(np.sort((wrapped + 180) % 360 - 180))
    assert "lon" not in notes(np.arange(0, 90, 10.0))


SERIES = xarray.Dataset({"y": (("time", "x"), np.zeros((4, 3)))}, {"x": [1.0, 2.0, 3.0], "time": np.arange(4)})
TWO = SERIES.assign(z=SERIES.y)
CLOCK = SERIES.assign_coords(time=np.array(["2020-01-02", "2020-01-01", "2020-01-03", "2020-01-04"], "datetime64[ns]"))


@pytest.mark.parametrize(
    ("ds", "given", "said"),
    [
        (SERIES, {"outputs": "temperature"}, "an output among the variables y. Got 'temperature'"),
        (SERIES, {"inputs": "latitude"}, "an input among the coordinates and variables .*x.* Got 'latitude'"),
        (SERIES, {"task": "hour"}, r"a dimension of y: time \(4\), x \(3\). Got 'hour'"),
        (SERIES, {"patch": {"lat": 2}}, "a dimension of y"),
        (SERIES, {"patch": {"x": 4}}, "at most 3 cells along x. Got 4"),
        (SERIES, {"patch": {"x": 0}}, "a positive number"),
        (SERIES, {"patch": {"x": 2}, "stride": {"x": 0}}, "a positive number"),
        (SERIES, {"stride": {"x": 1}}, "a stride along dimensions of the patch"),
        (SERIES, {"every": {"x": -1}}, "a positive number"),
        (SERIES, {"task": "time", "patch": {"time": 2}}, "in one role. Got time"),
        (SERIES, {"task": "time:noon"}, "a task like 'time:1D'"),
        (SERIES, {"task": "time:1D"}, "Expected times along time.*'time:24'"),
        (CLOCK, {"task": "time:1D"}, "Expected times in order along time"),
        (SERIES, {"inputs": ["x", "x"]}, "each input and output once"),
        (SERIES, {"inputs": ["y"], "outputs": ["y"]}, "in one role"),
        (SERIES, {"inputs": ["time"]}, "each dimension to be a task or an input. Got x"),
        (SERIES, {"inputs": []}, "at least one input"),
        (SERIES.rename(time="site"), {}, r"one dimension of time among those of y. Got site \(4\), x \(3\)"),
        (TWO, {}, r"which variables are the outputs .*: y \(time \(4\), x \(3\)\), z"),
        (TWO.assign(z=SERIES.y.isel(time=0)), {"outputs": ["y", "z"]}, "every output on the grid time, x. Got z on x"),
        (SERIES.assign(y=SERIES.y.astype(str)), {"outputs": "y"}, "numbers as the output y"),
        (SERIES.assign(y=SERIES.y.astype(str)), {}, "a variable with numbers"),
        (SERIES.assign_coords(x=["a", "b", "c"]), {}, "numbers or times as the input x"),
        (SERIES.assign(b=("k", [1, 2])), {"inputs": ["x", "b"], "outputs": "y"}, "the input b on the grid time, x. Got the dimension k"),
    ],
)
def test_what_does_not_fit_is_said(ds: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_grid(ds, **given)


def test_a_recipe_is_for_its_kind_of_data(tmp_path: Path, file: Path) -> None:
    recipe = read_grid(file).recipe
    celsius = write(tmp_path / "c.nc", temperature="degC")
    east = SERIES.rename(y="temperature", x="lon").expand_dims(lat=[1.0, 2.0]).assign_coords(lon=[340.0, 350.0, 359.0])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (celsius, {"recipe": recipe}, "temperature in K, as in the recipe. Got degC"),
        (east, {"recipe": recipe}, "counted from 0 to 360 in one"),
        (file, {"recipe": recipe, "task": "time"}, "Got task beside it"),
        (file, {"recipe": {"kind": "table"}}, "Got a recipe for 'table'"),
        (SERIES, {"recipe": recipe}, "an output among the variables y. Got 'temperature'"),
        (SERIES.rename(y="temperature"), {"recipe": recipe}, "Got the dimension|Got x"),
        (SERIES.rename(y="temperature", x="lat"), {"recipe": recipe}, "Got none called lon"),
        (xarray.open_dataset(file).expand_dims(level=[1, 2]), {"recipe": recipe}, r"Got level \(2\) too"),
    ]
    for source, given, said in cases:
        with pytest.raises(ValueError, match=said):
            read_grid(source, **given)
    cases[-1][0].close()


def test_infinite_outputs_are_refused_by_name() -> None:
    y = np.zeros((3, 4))
    y[1, 2] = np.inf
    tasks = read_grid(xarray.Dataset({"y": (("time", "x"), y)}))
    with pytest.raises(ValueError, match="infinite ones in the task 'time 1'"):
        tasks[1]


@pytest.mark.parametrize("kind", ["NETCDF4", "NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA"])
@pytest.mark.parametrize("share", [0.999, 0.9, 0.5, 0.01])
def test_a_file_cut_short_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    path = write(tmp_path / "t.nc", ("temperature", "rain"), kind=kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"Expected to read.*(cut short|Take another)"):
        list(read_grid(path, outputs=["rain"]))


@pytest.mark.parametrize("kind", ["NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA"])
@pytest.mark.parametrize("series", [("a",), ("a", "b")])
def test_a_classic_file_with_records_may_not_lack_a_byte(tmp_path: Path, kind: str, series: tuple[str, ...]) -> None:
    path = tmp_path / "r.nc"
    with netCDF4.Dataset(path, "w", format=kind) as file:
        file.createDimension("time", None)
        file.createDimension("x", 3)
        file.title = "records"
        file.createVariable("x", "f4", ("x",))[:] = [1, 2, 3]
        for name in series:
            file.createVariable(name, "i2", ("time", "x"))[:] = np.arange(15).reshape(5, 3)
    tasks = read_grid(path, outputs=series)
    assert len(tasks) == 5 and tasks[4][1][:, 0].tolist() == [12, 13, 14]
    # Behind the last value there may be padding, which nobody misses.
    content = path.read_bytes()
    lost = len(content) - content.rfind(np.array([14], ">i2").tobytes()) - 1
    path.write_bytes(content[:-lost])
    with pytest.raises(ValueError, match="bytes where the header says"):
        read_grid(path, outputs=series)


def test_other_files_are_refused(tmp_path: Path, file: Path) -> None:
    (tmp_path / "empty.nc").write_bytes(b"")
    (tmp_path / "text.nc").write_text("time,y\n1,2\n")
    (tmp_path / "noise.nc").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "hdf.nc").write_bytes(b"\x89HDF\r\n\x1a\n" + np.random.default_rng(0).bytes(5000))
    (tmp_path / "cdf.nc").write_bytes(b"CDF\x01" + np.random.default_rng(0).bytes(5000))
    (tmp_path / "t.nc.gz").write_bytes(gzip.compress(file.read_bytes()))
    (tmp_path / "w.grib").write_bytes(b"GRIB" + bytes(100))
    (tmp_path / "folder").mkdir()
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr" / ".zgroup").write_text("{not json")
    with netCDF4.Dataset(tmp_path / "groups.nc", "w") as groups:
        groups.createGroup("inner")
    said = {
        "empty.nc": "an empty file",
        "t.nc.gz": "unpack",
        "w.grib": "GRIB",
        "folder": "without zarr.json",
        "groups.nc": "none in its root",
    }
    names = [*said, "text.nc", "noise.nc", "hdf.nc", "cdf.nc", "zarr"]
    for name in names:
        with pytest.raises(ValueError, match=f"Expected.*{re.escape(name)}.*{said.get(name, '')}"):
            read_grid(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"Expected a netCDF file or zarr folder .*nowhere\.nc\. Got no such file"):
        read_grid(tmp_path / "nowhere.nc")
    with pytest.raises(TypeError, match="Expected the path of a netCDF file"):
        read_grid(3)  # type: ignore[arg-type]


@pytest.mark.skipif(ERA5 is None, reason="the ERA5 sample is not there")
def test_a_real_file_is_read_as_it_is() -> None:
    assert ERA5 is not None
    path = next(ERA5.glob("*.nc"))
    tasks = read_grid(path)
    with netCDF4.Dataset(path) as file:
        (name,) = [n for n, v in file.variables.items() if v.ndim == 3]
        fields = np.asarray(file[name][:], dtype=np.float64)
    assert len(tasks) == len(fields) and not tasks.lazy and tasks.describe().outputs[0]["unit"] == "K"
    np.testing.assert_array_equal(np.stack([y[:, 0] for _, y, _ in tasks]), fields.reshape(len(fields), -1))
    days = read_grid(path, task="time:1D", lazy=True)
    assert sum(days.sizes) == fields.size
    np.testing.assert_array_equal(days[1][1][:, 0], fields[24:48].ravel())
