//! Files and directories that cannot be written.

use std::fs;

use tensor_files::{Error, FloatType, LazyTensor, write_directory, write_tensors};

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
