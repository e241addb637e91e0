//! Directories that other programs wrote, and what they computed.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use safetensors::SafeTensors;

/// The project's own directory of this name.
pub(crate) fn golden(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden").join(name)
}

/// `input_ids` of a file of references.
pub(crate) fn tokens(reference: &Path) -> Tensor<2, Int> {
    let bytes = std::fs::read(reference).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let (chunks, _) = ids.data().as_chunks::<8>();
    let values: Vec<i32> = chunks
        .iter()
        .map(|&id| i64::from_le_bytes(id) as i32)
        .collect();
    let shape = [ids.shape()[0], ids.shape()[1]];
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// The values of a tensor.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}
