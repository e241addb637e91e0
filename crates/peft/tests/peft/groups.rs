//! Trainings by several members, each with a copy of the model.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use peft::{
    Batch, Bayesian, Checkpoints, Error, Evaluation, FitConfig, FitEnd, FitReport, Group, Lora,
    Method, Peqa, Threads, attach, fit, fit_in,
};
use quant_core::Rtn;

use crate::model::{Bigram, batch, parameters, quantized};

fn batches(n: u64) -> Vec<Batch> {
    (0..n).map(|at| batch(at, [2, 9])).collect()
}

fn model(method: &dyn Method) -> Bigram {
    let mut model = quantized(3, &Rtn::new().with_group_size(32));
    attach(&mut model, method).unwrap();
    model
}

/// What each member of a group of threads does with its copy of a model.
fn in_threads<T: Send>(
    n: usize,
    model: &Bigram,
    work: impl Fn(&mut Bigram, &Threads) -> T + Sync,
) -> Vec<(Bigram, T)> {
    thread::scope(|scope| {
        let members = Threads::new(n).into_iter().map(|member| {
            let (mut model, work) = (model.clone(), &work);
            scope.spawn(move || {
                let done = work(&mut model, &member);
                (model, done)
            })
        });
        let threads: Vec<_> = members.collect();
        let threads = threads.into_iter().map(|thread| thread.join().unwrap());
        threads.collect()
    })
}

fn config() -> FitConfig {
    FitConfig::new()
        .with_learning_rate(0.02)
        .with_epochs(2)
        .with_accumulation(2)
}

/// Two members and two batches: one sum, whatever its order. The last step of an epoch has one batch, so
/// that one member has nothing to do in it.
#[test]
fn two_members_are_one_that_accumulates() {
    let methods: [(&str, Box<dyn Method>); 3] = [
        (
            "LoRA with dropout",
            Box::new(Lora::new(2).with_dropout(0.5)),
        ),
        ("PEQA", Box::new(Peqa::new().with_zeros(true))),
        // Its penalty is added once.
        ("gates that are drawn", Box::new(Bayesian::new(4))),
    ];
    let batches = batches(5);
    for (name, method) in methods {
        let held_out = Evaluation::new(vec![batch(50, [2, 9]), batch(51, [1, 9])]);
        let config = config()
            .with_evaluation(held_out.with_every(2).with_restore_best(true))
            .with_neftune_alpha(5.0);
        let start = model(&*method);
        let mut alone = start.clone();
        let expected = fit(&mut alone, &batches, &config, |_, _| {}).unwrap();
        let members = in_threads(2, &start, |model, member| {
            fit_in(model, &batches, &config, member, |_, _| {}).unwrap()
        });
        for (model, report) in members {
            assert_eq!(report.steps, expected.steps, "{name}");
            assert_eq!(parameters(&model), parameters(&alone), "{name}");
        }
    }
}

/// More members sum in another order, and all in the same.
#[test]
fn three_members_agree_within_rounding() {
    let batches = batches(7);
    let config = config().with_accumulation(4);
    let start = model(&Lora::new(2));
    let mut alone = start.clone();
    let expected = fit(&mut alone, &batches, &config, |_, _| {}).unwrap();
    let members = in_threads(3, &start, |model, member| {
        fit_in(model, &batches, &config, member, |_, _| {}).unwrap()
    });
    let (first, _) = &members[0];
    for (model, report) in &members {
        assert_eq!(parameters(model), parameters(first));
        for (step, expected) in report.steps.iter().zip(&expected.steps) {
            let (loss, expected) = (step.loss, expected.loss);
            assert!(
                (loss - expected).abs() < 1e-5 * expected,
                "{loss} for {expected}"
            );
        }
    }
}

#[test]
fn one_that_breaks_off_ends_all_and_they_resume_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("checkpoints");
    let batches = batches(5);
    let start = model(&Lora::new(2).with_dropout(0.5));
    let mut alone = start.clone();
    fit(&mut alone, &batches, &config(), |_, _| {}).unwrap();
    let run = |stop: Option<usize>| -> Vec<(Bigram, FitReport)> {
        let checkpoints = Checkpoints::new(&dir).with_resume(stop.is_none());
        let config = config().with_checkpoints(checkpoints);
        in_threads(2, &start, |model, member| {
            fit_in(model, &batches, &config, member, |step, _| {
                if member.rank() == 1 && Some(step.index) == stop {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })
            .unwrap()
        })
    };
    for (_, report) in run(Some(3)) {
        assert_eq!((report.end, report.steps.len()), (FitEnd::Callback, 3));
    }
    assert!(dir.join("step-3").is_dir());
    for (model, report) in run(None) {
        assert_eq!(
            (report.end, report.resumed_from),
            (FitEnd::LastStep, Some(3))
        );
        assert_eq!(parameters(&model), parameters(&alone));
    }
}

#[test]
fn members_that_differ_or_end_are_errors_of_all() {
    let start = model(&Lora::new(2));
    let problem = |done: Result<FitReport, Error>| match done {
        Err(Error::Group { problem }) => problem,
        other => panic!("{other:?}"),
    };
    for (_, done) in in_threads(2, &start, |model, member| {
        let batches = batches(5 + member.rank() as u64);
        fit_in(model, &batches, &config(), member, |_, _| {})
    }) {
        assert_eq!(
            problem(done),
            "member 1 has another base, other data or other settings than member 0"
        );
    }
    for (_, done) in in_threads(2, &start, |model, member| {
        peft::detach(model).unwrap();
        attach(model, &Lora::new(2).with_seed(member.rank() as u64)).unwrap();
        fit_in(model, &batches(5), &config(), member, |_, _| {})
    }) {
        assert_eq!(
            problem(done),
            "member 1 has other parameters that train than member 0"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    for (_, done) in in_threads(2, &start, |model, member| {
        let checkpoints = Checkpoints::new(dir.path().join("checkpoints"));
        let checkpoints = (member.rank() == 0).then_some(checkpoints);
        let config = config().with_checkpoints(checkpoints);
        fit_in(model, &batches(5), &config, member, |_, _| {})
    }) {
        assert_eq!(
            problem(done),
            "member 1 has another base, other data or other settings than member 0"
        );
    }

    // One panics in its callback; the other is told at its next sum.
    let has_panicked = AtomicBool::new(false);
    let members = Threads::new(2).into_iter();
    thread::scope(|scope| {
        let threads: Vec<_> = members
            .map(|member| {
                let (mut model, has_panicked) = (start.clone(), &has_panicked);
                scope.spawn(move || {
                    let config = config();
                    fit_in(&mut model, &batches(5), &config, &member, |step, _| {
                        if member.rank() == 1 && step.index == 2 {
                            has_panicked.store(true, Ordering::SeqCst);
                            std::panic::resume_unwind(Box::new("ended"));
                        }
                    })
                })
            })
            .collect();
        let mut done: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        assert!(done.pop().unwrap().is_err() && has_panicked.load(Ordering::SeqCst));
        let first = done.pop().unwrap().unwrap();
        assert_eq!(problem(first), "a member has left before the others");
    });

    // One has an error of its own, and is kept by its owner.
    let members = Threads::new(2);
    let done: Vec<_> = thread::scope(|scope| {
        let threads = members.iter().map(|member| {
            let mut model = start.clone();
            scope.spawn(move || {
                let n = if member.rank() == 1 { 0 } else { 5 };
                fit_in(&mut model, &batches(n), &config(), member, |_, _| {})
            })
        });
        let threads: Vec<_> = threads.collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let [first, second] = <[_; 2]>::try_from(done).unwrap();
    assert_eq!(problem(first), "a member has left before the others");
    assert!(matches!(second, Err(Error::NoBatches)));

    // A step with fewer batches than members.
    for (_, done) in in_threads(3, &start, |model, member| {
        fit_in(model, &batches(5), &config(), member, |_, _| {})
    }) {
        let error = done.unwrap_err();
        assert!(matches!(
            error,
            Error::Setting {
                setting: "accumulation",
                ..
            }
        ));
    }
}
