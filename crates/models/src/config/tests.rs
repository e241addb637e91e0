use std::collections::BTreeSet;
use std::convert::Infallible;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use peft::{Linears, Stages, Weight};

use super::*;
use crate::source::{HEAD, Vector, weight_name};
use crate::{Gemma2Config, LlamaConfig, Model, Olmo2Config, Phi3Config};
use peft::Table;

#[path = "../../tests/fixtures/architectures.rs"]
mod fixtures;

use fixtures::{SMALL, architectures};

/// A source that fills each parameter with the index of its name.
#[derive(Default)]
struct Named(Vec<String>);

impl Named {
    fn parameter<const D: usize>(&mut self, name: String, dims: [usize; D]) -> Param<Tensor<D>> {
        let index = self.0.len() as f64;
        self.0.push(name);
        Param::from_tensor(Tensor::full(dims, index, &Device::flex()))
    }

    #[track_caller]
    fn assert_name<const D: usize>(&self, values: Tensor<D>, name: &str) {
        let index = values.max().into_scalar::<f32>() as usize;
        assert_eq!(self.0[index], name);
    }
}

impl Source for Named {
    type Error = Infallible;

    fn vector(
        &mut self,
        path: &str,
        kind: Vector,
        len: usize,
    ) -> Result<Param<Tensor<1>>, Infallible> {
        Ok(self.parameter(kind.name(path), [len]))
    }

    fn table(&mut self, path: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>, Infallible> {
        Ok(self.parameter(weight_name(path), dims))
    }

    fn weight(&mut self, path: &str, dims: [usize; 2]) -> Result<Weight, Infallible> {
        self.table(path, dims).map(Weight::Dense)
    }

    fn head(&mut self, dims: [usize; 2]) -> Result<Weight, Infallible> {
        self.weight(HEAD, dims)
    }
}

#[test]
fn every_parameter_is_the_one_of_its_name() {
    for config in architectures(SMALL) {
        let mut source = Named::default();
        let Ok(model) = Model::build(config.clone(), &mut source);
        let mut n = 0;
        let mut check = |name: &str, values: Tensor<1>| {
            source.assert_name(values, name);
            n += 1;
        };
        let projections = config.projections();
        assert_eq!(projections.len(), model.linears().len());
        for ((path, linear), (planned, dims)) in model.linears().into_iter().zip(projections) {
            assert_eq!((&path, linear.weight().dims()), (&planned, dims));
            check(
                &weight_name(&path),
                linear.weight().to_dense().flatten(0, 1),
            );
            if let Some(bias) = linear.bias() {
                check(&Vector::Bias.name(&path), bias);
            }
        }
        for (name, table) in model.tables() {
            let values = match table {
                Table::Vector(vector) => vector.val(),
                Table::Matrix(table) => table.val().flatten(0, 1),
            };
            check(&name, values);
        }
        for (path, weight) in model.other_weights() {
            check(&weight_name(&path), weight.to_dense().flatten(0, 1));
        }
        assert_eq!(n, source.0.len());

        let mut again = model.clone();
        let paths = again.linears_mut().into_iter().map(|(path, linear)| {
            source.assert_name(linear.weight().to_dense(), &weight_name(&path));
            path
        });
        let paths: Vec<String> = paths.collect();
        assert_eq!(model.stages().last().unwrap().end, paths.len());
    }
}

#[test]
fn every_model_type_has_a_configuration_that_is_read_back() {
    let mut types = BTreeSet::new();
    for config in architectures(SMALL) {
        let json = config.to_json();
        types.insert(json["model_type"].as_str().unwrap().to_string());
        let read = Config::from_json(&json, Path::new("config.json")).unwrap();
        assert_eq!(read.to_json(), json);
        // What is computed is the same, whether it is stated for each layer or by a rule.
        assert_eq!(read.identity(), config.identity());
    }
    let known = Config::model_types().into_iter().map(String::from);
    assert_eq!(types, known.collect());
}

/// A part of a head is written so that its product with the width is cut to the same dimensions.
#[test]
fn the_rotated_part_of_a_head_is_read_back() {
    for head_dim in (2..=256).step_by(2) {
        for rotary_dims in (2..=head_dim).step_by(2) {
            let llama = LlamaConfig::default()
                .with_num_hidden_layers(1)
                .with_head_dim(head_dim);
            let config = Phi3Config::default()
                .with_llama(llama)
                .with_rotary_dims(rotary_dims);
            let read = Config::from_json(&config.to_json(), Path::new("config.json"));
            assert_eq!(read.unwrap(), config.into());
        }
    }
}

/// A window that reaches all tokens is none.
#[test]
fn a_window_longer_than_texts_changes_no_identity() {
    let gemma = Gemma2Config::default();
    let windowed = |window: Option<usize>| {
        let llama = gemma.llama.clone().with_sliding_window(window);
        Config::from(gemma.clone().with_llama(llama)).identity()
    };
    assert_eq!(windowed(Some(4096)), windowed(None));
    assert_ne!(windowed(Some(4095)), windowed(None));
}

#[test]
#[should_panic(expected = "no config.json has this shape")]
fn a_shape_that_no_model_type_has_is_not_written() {
    let llama = LlamaConfig::default().with_sliding_window(5);
    Config::from(Olmo2Config::from(llama)).to_json();
}
