//! QA-LoRA against PEFT (`tests/golden/README.md`).

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use peft::{Adapter, Adapters, Exactness, Linear, Linears, Weight};
use quant_core::{Format, Grid, Parts, QuantTensor};
use tensor_files::{FloatType, LazyTensor, TensorFile, write_tensors};

#[derive(Module, Debug)]
struct Layer {
    proj: Linear,
}

impl Linears for Layer {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("proj".into(), &self.proj)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![("proj".into(), &mut self.proj)]
    }
}

pub(crate) fn golden_dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
}

fn golden() -> TensorFile {
    TensorFile::open(&golden_dir().join("layer.safetensors")).unwrap()
}

fn tensor(name: &str) -> Tensor<2> {
    let (values, dims) = golden().floats::<2>(name).unwrap();
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

pub(crate) fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

/// The largest difference, relative to the largest value.
pub(crate) fn difference(found: Tensor<2>, expected: Tensor<2>) -> f32 {
    let largest = expected.clone().abs().max().into_scalar::<f32>();
    (found - expected).abs().max().into_scalar::<f32>() / largest
}

/// The packed layer of the file.
fn packed() -> QuantTensor {
    let mut file = golden();
    let (columns, _) = file.words::<2>("qweight").unwrap();
    let (scales, _) = file.floats::<2>("scales").unwrap();
    let (zeros, _) = file.words::<2>("qzeros").unwrap();
    let zeros = zeros
        .iter()
        .flat_map(|word| (0..8).map(move |at| ((word >> (4 * at)) & 15) as f32));
    let format = Format::new(4, Some(32), Grid::Affine).unwrap();
    let layout = format.layout([128, 64]).unwrap();
    let parts = Parts::from_columns(&columns, &layout, scales, Some(zeros.collect())).unwrap();
    QuantTensor::from_parts(parts, format, [128, 64], &Device::flex()).unwrap()
}

/// The layer with PEFT's adapter on `weight`, by way of a directory as PEFT writes it.
fn adapted(weight: Weight, dir: &Path) -> Layer {
    std::fs::create_dir_all(dir).unwrap();
    let tensors = ["lora_A", "lora_B"].map(|factor| {
        let name = format!("base_model.model.proj.{factor}.default.weight");
        let (values, dims) = golden().floats::<2>(&name).unwrap();
        let name = format!("base_model.model.proj.{factor}.weight");
        (
            name,
            LazyTensor::floats_as(FloatType::F32, dims, move || values.clone()),
        )
    });
    write_tensors(&dir.join("adapter_model.safetensors"), tensors).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["proj"],
        "use_qalora": true, "qalora_group_size": 32}"#;
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    let mut model = Layer {
        proj: Linear::new(weight, None),
    };
    let adapters = Adapters::load_hf(dir, &model).unwrap();
    peft::activate(&mut model, &adapters).unwrap();

    // Written again, it is the same.
    let again = dir.join("again");
    adapters.save_hf(&again, &model).unwrap();
    let read = |dir: &Path| {
        let mut file = TensorFile::open(&dir.join("adapter_model.safetensors")).unwrap();
        let names = file.names();
        names
            .into_iter()
            .map(|name| (file.floats::<2>(&name).unwrap(), name))
            .collect::<Vec<_>>()
    };
    assert_eq!(read(dir), read(&again));
    model
}

#[test]
fn qa_lora_is_pefts() {
    let dir = tempfile::tempdir().unwrap();
    let dense = Weight::frozen(tensor("dequantized").transpose());
    let model = adapted(dense, &dir.path().join("dense")).train();
    let y = model.proj.forward(tensor("x").autodiff());
    assert!(difference(y.clone().inner(), tensor("y")) < 1e-6);
    let gradients = y.square().sum().backward();
    let Some(Adapter::Tile(adapter)) = model.proj.adapter() else {
        panic!("not QA-LoRA");
    };
    let (a, b) = adapter.factors().unwrap();
    for (factor, name) in [(a, "lora_A"), (b, "lora_B")] {
        let name = format!("grad.base_model.model.proj.{name}.default.weight");
        let found = factor.grad(&gradients).unwrap().transpose();
        assert!(difference(found, tensor(&name)) < 1e-6, "{name}");
    }
}

/// PEFT refuses this merge. Here it goes into the zeros, and the outputs stay.
#[test]
fn pefts_qa_lora_merges() {
    let dir = tempfile::tempdir().unwrap();
    let packed = packed();
    // The reference rounds the weight to f16.
    assert!(difference(packed.dequantize().transpose(), tensor("dequantized")) < 2f32.powi(-11));
    let mut model = adapted(Weight::Quant(packed.clone()), &dir.path().join("packed"));
    let y = model.proj.forward(tensor("x"));
    assert!(difference(y.clone(), tensor("y")) < 1e-3);
    let certificate = peft::merge(&mut model).unwrap();
    let Exactness::Bounded {
        max_weight_error,
        max_weight,
    } = certificate.layers[0].exactness
    else {
        panic!("{certificate}");
    };
    assert!(max_weight_error < 1e-6 * max_weight);
    assert!(difference(model.proj.forward(tensor("x")), y) < 1e-6);
    let Weight::Quant(merged) = model.proj.weight() else {
        panic!("not packed");
    };
    assert_eq!(merged.codes(), packed.codes());
    assert_eq!(values(merged.scales()), values(packed.scales()));
    assert!(
        values(merged.zeros().unwrap())
            .iter()
            .any(|zero| zero.fract() != 0.0)
    );
}
