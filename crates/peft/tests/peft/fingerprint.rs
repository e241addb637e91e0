//! The parameters that a fingerprint covers.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use peft::{Error, Fingerprint, Linear, Linears, Lora, Peqa, Weight};
use quant_core::Rtn;
use sha2::{Digest, Sha256};

/// Values that differ from each other, all of them floats with few digits.
fn matrix(dims: [usize; 2], first: f32) -> Tensor<2> {
    let values = (0..dims[0] * dims[1]).map(|at| first + at as f32 / 8.0);
    let values = values.collect::<Vec<_>>();
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

/// A part of a model that is called like the field of [`Linear`], with layers of its own.
#[derive(Module, Debug)]
struct Bottleneck {
    down: Linear,
    gain: Param<Tensor<2>>,
}

#[derive(Module, Debug)]
struct Bottlenecked {
    proj: Linear,
    adapter: Bottleneck,
}

impl Linears for Bottlenecked {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("proj".into(), &self.proj)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![("proj".into(), &mut self.proj)]
    }
}

fn model() -> Bottlenecked {
    let linear = |first| Linear::new(Weight::frozen(matrix([4, 4], first)), None);
    Bottlenecked {
        proj: linear(1.0),
        adapter: Bottleneck {
            down: linear(-3.0),
            gain: Param::from_tensor(matrix([1, 4], 0.5)),
        },
    }
}

/// A field named `adapter` is hashed like any other.
#[test]
fn weights_below_a_field_called_adapter_are_certified() {
    for quantized in [false, true] {
        let mut merged = model();
        if quantized {
            let linears = merged.linears_mut().into_iter();
            for (path, linear) in linears {
                linear.quantize(&path, &Rtn::new(), None).unwrap();
            }
            peft::attach(&mut merged, &Peqa::new()).unwrap();
        } else {
            peft::attach(&mut merged, &Lora::new(2)).unwrap();
        }
        let certificate = peft::merge(&mut merged).unwrap();
        certificate.verify(&merged).unwrap();
        certificate.verify(&merged.clone()).unwrap();

        let linear = |first| Linear::new(Weight::frozen(matrix([4, 4], first)), None);
        let mut others = vec![merged.clone(), merged.clone(), merged.clone()];
        others[0].adapter.down = linear(-2.875);
        others[1].adapter.gain = Param::from_tensor(matrix([1, 4], 0.75));
        // The same parameter by its identity, with other values.
        others[2].adapter.gain = others[2].adapter.gain.clone().map(|gain| gain * 2.0);
        for other in others {
            let error = certificate.verify(&other).unwrap_err();
            assert!(matches!(error, Error::NotMerged { .. }), "{error}");
        }
    }
}

/// An adapter counts where the model does not list its layer: no one merges it.
#[test]
fn only_adapters_of_listed_layers_are_left_out() {
    let base = Fingerprint::of(&model());
    let mut adapted = model();
    peft::attach(&mut adapted, &Lora::new(2)).unwrap();
    assert_eq!(Fingerprint::of(&adapted), base);
    let mut hidden = model();
    hidden.adapter.down = adapted.proj.clone();
    let bare = Fingerprint::of(&hidden);
    peft::freeze_base(&mut adapted);
    peft::detach(&mut adapted).unwrap();
    hidden.adapter.down = adapted.proj.clone();
    assert_ne!(Fingerprint::of(&hidden), bare);
}

/// The bytes that are hashed: formats of layers, then names, shapes and values of parameters.
#[test]
fn a_fingerprint_is_of_these_bytes() {
    let mut bytes = b"proj [4, 4] dense\n".to_vec();
    let mut parameter = |name: &str, values: Tensor<2>| {
        bytes.extend(format!("{name} {:?}\n", values.dims()).bytes());
        let values = values.into_data().try_into_vec::<f32>().unwrap();
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    parameter("proj.weight", matrix([4, 4], 1.0));
    parameter("adapter.down.weight", matrix([4, 4], -3.0));
    parameter("adapter.gain", matrix([1, 4], 0.5));
    let hex: String = (Sha256::digest(&bytes).iter())
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        Fingerprint::of(&model()).to_string(),
        format!("sha256:{hex}")
    );
}
