from setuptools import find_packages, setup

# What starts runs and what runs inside the sandbox lie at the top level and travel in the wheel under the package.
setup(
    packages=find_packages("src") + ["hdpo.launch", "hdpo.sandbox"],
    package_dir={"": "src", "hdpo.launch": "launch", "hdpo.sandbox": "sandbox"},
    package_data={"hdpo": ["py.typed", "*/assets/**"], "hdpo.launch": ["**"], "hdpo.sandbox": ["**"]},
)
