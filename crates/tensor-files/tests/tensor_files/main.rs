//! Files and directories that cannot be written.

mod output;
mod series;

use std::error::Error as _;
use std::fs;
use std::path::Path;

use tensor_files::{
    Error, FloatType, LazyTensor, TensorFile, read, write, write_directory, write_json,
    write_tensors,
};

/// The path as the caller has it, and the cause once: neither is lost by a program that prints the
/// message alone, nor said twice by one that prints all causes.
#[test]
fn an_error_of_the_system_says_where_and_why() {
    let path = Path::new("missing/file");
    let tensors = [("t".to_string(), LazyTensor::bytes([1], || vec![1]))];
    let errors = [
        read(path).unwrap_err(),
        TensorFile::open(path).unwrap_err(),
        write(path, b"").unwrap_err(),
        write_json(path, &0).unwrap_err(),
        write_tensors(path, tensors).unwrap_err(),
    ];
    for error in errors {
        let said = error.to_string();
        assert!(
            said.starts_with("`missing/file`: No such file or directory"),
            "{said}"
        );
        assert!(error.source().is_none());
    }
}

/// A file of which the disk has no room for a byte.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_of_the_system() {
    let full = Path::new("/dev/full");
    let error = write(full, b"text").unwrap_err();
    assert!(
        error.to_string().starts_with("`/dev/full`: No space"),
        "{error}"
    );
}

#[test]
fn a_failed_write_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("new");
    let failed = || Error::MissingTensor {
        path: target.clone(),
        tensor: "weight".into(),
    };
    let error = write_directory(&target, |staging| {
        fs::write(staging.join("half"), "written").unwrap();
        Err(failed())
    });
    assert!(matches!(error, Err(Error::MissingTensor { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    // An empty directory may be filled, a file may not be replaced.
    fs::create_dir(&target).unwrap();
    write_directory(&target, |_| Ok::<(), Error>(())).unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "something else").unwrap();
    let error = write_directory(&file, |_| Ok::<(), Error>(()));
    assert!(matches!(error, Err(Error::OutputExists { .. })));
    assert_eq!(fs::read_to_string(&file).unwrap(), "something else");
}

#[test]
fn a_wrong_number_of_values_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tensors.safetensors");
    let wrong = |n: usize| {
        [
            LazyTensor::floats([2, 2], move || vec![0.5; n]),
            LazyTensor::floats_as(FloatType::F32, [2, 2], move || vec![0.5; n]),
            LazyTensor::words([4], move || vec![1; n]),
            LazyTensor::bytes([4], move || vec![1; n]),
        ]
    };
    for tensor in [wrong(3), wrong(5)].into_iter().flatten() {
        let right = LazyTensor::floats([4], || vec![0.25; 4]);
        let tensors = [("right".to_string(), right), ("wrong".to_string(), tensor)];
        let error = write_tensors(&path, tensors).unwrap_err();
        let named = matches!(&error, Error::Tensor { tensor, .. } if tensor == "wrong");
        assert!(named, "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

/// A hidden name is nothing that the caller knows.
#[test]
fn errors_have_the_name_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("new");
    let error = write_directory(&target, |dir| {
        let missing = read(&dir.join("missing")).unwrap_err();
        assert!(matches!(missing, Error::Io { path, .. } if path == target.join("missing")));
        let tensor = LazyTensor::bytes([2], || vec![1]);
        write_tensors(&dir.join("tensors"), [("short".to_string(), tensor)])
    });
    let said = error.unwrap_err().to_string();
    assert!(
        said.contains(&format!("`{}`", target.join("tensors").display())),
        "{said}"
    );
}
